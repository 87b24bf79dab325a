"""longreach: extend the context of open LLMs, and measure that it worked.

The checkout is the package (`package-dir` in pyproject.toml): `longreach.training` is the folder `training/`.
The rooms are `attention`, `infra`, `training`, `evaluation` and `pipelines`; docs/architecture.md says what each holds.
"""
