"""Tests by surface: what a hostile or broken input must not be able to do."""
