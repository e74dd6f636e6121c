"""What people run: the command line, the demo, the report and the release."""
