"""The parts of `tools/bench_kernels.py`: what is timed, how, against which roofline, and how it is written down."""
