"""The evaluation of pictures that models draw from captions: `evaluate.py` with `evaluation: pictures`.

`settings` reads the YAML, `pictures` pairs rows with pictures and draws them, `frame` is what measurements stand on,
`run` the order, `report` writes. A measurement is a module of its name: `fidelity`, `overlap`, `elb`, `reranking`,
`shapes`, `safety`.
"""
