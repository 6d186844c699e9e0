"""The Kafka gateway: archive groups into Kafka, nodes joined by Kafka."""
