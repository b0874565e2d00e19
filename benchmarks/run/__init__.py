"""Scripts, each one a record or a part of one: ``python -m benchmarks.run.suite`` runs them all."""
