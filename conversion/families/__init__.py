"""One module a family of checkpoints: what its keys are in ours, which sizes its weights show, what its card says.

Each has `read_source(source) -> Conversion` and `verify(folder, conversion) -> Verification`.
"""
