"""What a CPU without Apple's Accelerate does better by NumPy: products with weights, and the stages made of them.

MLX's CPU back end calls ``cblas_sgemm`` for every product, which copies the whole matrix into panels even for a single
row. NumPy calls ``sgemv`` for one row, and its wheels carry a newer OpenBLAS than most systems have. The modules here
take the places of the models' own (`prepare.prepare`), read MLX's arrays where they lie, and give MLX arrays back. They
compute when they are called: gradients need training mode, in which MLX computes, and `mx.compile` and `mx.vmap` the
models' own modules.
"""
