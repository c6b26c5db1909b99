"""The compressor: tensors only. Settings, the plan of what is compressed, the arithmetic, and what is remembered.

Axis letters, here and in `exchange`:

    n   rows of a gradient seen as a matrix: ``shape[0]``
    m   its columns: the product of the other dimensions
    r   rank: columns kept of each factor

A factor is stored **rank first**: the ``P`` of the paper, an (n, r) matrix, is a tensor of shape (r, n) here, and its
``Q`` is (r, m). Stored (n, r), the product ``M.T @ P`` runs some twenty times slower on a CPU, since it strides
through the factor.
"""
