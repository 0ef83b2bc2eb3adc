"""Converters of the DALL-E family's public checkpoints: `python -m conversion.convert FAMILY SOURCE OUTPUT`.

Scripts beside the package: nothing in `hf_dalle` imports them. README.md here has the table of families.
"""
