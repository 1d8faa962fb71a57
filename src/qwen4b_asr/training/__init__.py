"""The recipe of the demo model: spoken numbers, from two archives of recordings to a model directory.

`recipe` says what is trained and for how long; `__main__` is the command line.
Nothing is imported here: ``python -m qwen4b_asr.training --help`` must not start MLX.
"""
