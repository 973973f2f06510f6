"""Bridges to other explanation libraries; none of them is imported."""
