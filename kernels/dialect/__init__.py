"""The relevance dialect: per op a contract, an eager reference, a fake form and samples; no triton is imported."""
