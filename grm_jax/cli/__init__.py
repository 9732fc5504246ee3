"""The command line, `grm-jax`: one thin file for each subcommand."""
