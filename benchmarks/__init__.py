"""Benchmarks next to the peers: run/ measures and writes results/*.json, report/ makes the page of them."""

from benchmarks import ran

ran.watch()
