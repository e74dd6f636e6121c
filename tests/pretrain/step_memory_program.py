"""Run by test_train_memory.py: train on one rank, and print the most memory this process ever had resident."""

import resource
import sys

from boldforge.pretrain import train

if __name__ == "__main__":
    code = train.main(sys.argv[1:])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    sys.exit(code)
