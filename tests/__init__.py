"""Tests of jaxmem; the folders mirror the package."""
