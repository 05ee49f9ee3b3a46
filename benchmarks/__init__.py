"""Benchmarks of the operator against what a JAX user would use instead: `python -m benchmarks`.

One process only reports (`cli`); another, with a clean environment, measures (`measure`). What is
measured is data (`shapes`, `cases`, `suites`), what must be reached too (`targets`).
"""
