"""A bank that is none: it speaks the rail protocol from the other side, keeps a ledger of its own, and can behave badly."""
