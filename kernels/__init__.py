"""The relevance dialect: the maths of the hot relevance ops as plain torch functions on coefficients.

Each function states its shapes, its formula and its source, and is what rules emit and what differentiable
relevance lowers to. Importing this package imports no triton.
"""
