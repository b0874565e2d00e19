"""The attribution methods; each file holds one."""
