"""The subcommands of `moelet` beside those that train: one file for each family of verbs."""
