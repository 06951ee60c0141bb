"""Decoding: how a canvas of masks becomes text."""
