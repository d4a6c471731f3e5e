"""The proof run: the whole product on one GPU in one command of less than ten minutes.

`python tests gpu`, which `make gpu` calls, runs each part in a process of its own and writes summary.md, results.json
and one log a part.
"""
