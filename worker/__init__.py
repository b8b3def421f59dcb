"""The working side: settles payouts, tells merchants, watches."""
