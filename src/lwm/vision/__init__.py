"""Pictures and videos, and the codes that stand for them."""
