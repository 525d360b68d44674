"""Tests by tool and kind of fault: inputs as real tools and people send them."""
