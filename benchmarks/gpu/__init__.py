"""What the project claims about GPUs, checked and measured on the GPU at hand by one command.

    python -m benchmarks.gpu --out DIR

`docs/how-to/gpu.md` explains the steps and the results.
"""
