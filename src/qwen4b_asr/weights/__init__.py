"""Weights: readers that never need torch, key maps, conversion, checks and strict loading.

Import what you need from the submodules; nothing is imported here.
"""
