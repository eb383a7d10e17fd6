"""Objectives, optimizer and the one train step."""
