"""All AMQP. Messages carry ids and make work happen now; PostgreSQL owns it. Whatever is lost here costs latency only."""
