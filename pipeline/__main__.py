"""`python -m pipeline` is the `budgetline` command."""

from pipeline.launch import main

main()
