"""What tests and benchmarks of parallel training share: ranks that stay alive, comparison by name, worlds that do not
exist, and what a rank sends."""
