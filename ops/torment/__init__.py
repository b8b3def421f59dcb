"""`make torment`: the product among a bank in its worst mood and processes that die, and then the books side by side.

Everything runs on this machine in a folder of its own: PostgreSQL, RabbitMQ if there is one, two gateways, five workers, a bank
with books of its own, a receiver of callbacks.
"""
