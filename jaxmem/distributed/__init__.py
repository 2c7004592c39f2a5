"""Meshes and shardings: one helper that makes the mesh, one table that places every array."""
