"""What is in a package that AOTInductor made, read off its files: nothing is loaded or run, and no GPU is needed.

`archive` opens it, `native` reads the shared library, `cubin` the GPU's code in it, `wrapper` and `kernels` the sources
that Inductor leaves beside it. `check` judges what they found, and refuses what a package should not hold; `report`
shows it.
"""

from __future__ import annotations
