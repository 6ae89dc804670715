"""Benchmarks: `python -m benchmarks [names]` prints a table.

One file per question, named without an underscore; each has `questions(sizes)`, which measures and yields
`Question`s, with a rival that does the same work beside it in the same run. The numbers that count are ratios.
"""
