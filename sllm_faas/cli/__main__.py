"""`python -m sllm_faas.cli`: the `sllm` command where its script is not installed."""

from sllm_faas.cli import main

main()
