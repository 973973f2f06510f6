"""The Triton kernels of the relevance dialect, one file per file of ``dialect``; nothing imports them before use."""
