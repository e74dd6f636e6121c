"""One training step of an adapter or of all weights at the NeuroSTORM size, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Runs alone in its process, so that its peak is that of one kind.
_CHILD = """
import json, resource, statistics, sys, time
import torch
from boldforge.data_shards import brain_mask, get_grid
from boldforge.finetune import AdapterConfig, Classifier, NeuroStormBackbone, get_task
from boldforge.pretrain import ModelConfig, Pretrained, build_model

kind, n_steps, first_stage = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
grid = get_grid("mni2mm")
mask = brain_mask(grid)
# The published encoder: 12 mm patches, width 36, depths 2-2-6-2, 20 frames; tokens of the brain alone.
config = ModelConfig(frames=20, embed_dim=36, depths=(2, 2, 6, 2), window=(4, 4, 4, 4), last_window=(2, 2, 2, 4),
                     d_state=16, decoder=False, backend="auto")
model = build_model(config, mask, grid.voxel_size)
backbone = NeuroStormBackbone(Pretrained(model, {"data": {}}, ""))
backbone.network.requires_grad_(False).eval()
adapter = AdapterConfig(kind=kind, first_stage=first_stage, **({"rank": 4} if kind == "lora" else {}))
classifier = Classifier(backbone, get_task("adhd"), adapter)
classifier.train(True)
trainable = [p for p in classifier.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=1e-4)
values = torch.randn(1, 20, int(mask.sum()))
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 1024
with torch.no_grad():
    partway = backbone.encode_until(values, first_stage)
seconds = []
for _ in range(n_steps + 1):
    start = time.process_time()
    logits = classifier.head(backbone.embed_from(partway, first_stage)).squeeze(-1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(1))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    seconds.append(time.process_time() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"step_seconds": statistics.median(seconds[1:]), "memory_mb": (peak - before) / 1024,
                  "peak_mb": peak / 1024, "trainable": classifier.trainable, "total": classifier.total}))
"""


def measure(kind: str, n_steps: int, first_stage: int = 0) -> dict[str, float]:
    """Train a few steps on one clip; what lies below `first_stage` is computed once, before them.

    Returns
    -------
    dict
        ``step_seconds`` of processor time on one thread, the median after a first one; ``memory_mb``, the process's
        peak less what it held before the first step; ``peak_mb``, all of it; ``trainable`` and ``total`` parameters.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD, kind, str(n_steps), str(first_stage)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=Path.cwd())
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])
