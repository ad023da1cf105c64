"""What runs inside an engine's own Python. This folder is put on the engine's PYTHONPATH: it holds nothing else."""
