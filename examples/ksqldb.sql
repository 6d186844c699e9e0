-- Streams and tables of MQTT messages for ksqlDB [K15]: what examples/sensor_streams.py does, as queries.
--
-- Written against ksqlDB's reference; the tests of this repository do not run it, they compare it with the schema of the
-- records (gateways/kafka/schemas/mqtt_message.schema.json) and with the program beside it, which they do run.

SET 'auto.offset.reset' = 'earliest';

-- One row for each record. The key is the MQTT topic (records of other programs may be without), ROWTIME the publish
-- time; the value's own timestamp is text, ISO 8601, and so are the milliseconds that a group with TimestampFormat =
-- "epoch_ms" writes to its topic, since numbers are read as text, too. Names match those of the JSON value in any case.
CREATE STREAM mqtt_messages (
    mqtt_topic VARCHAR KEY,
    `timestamp` VARCHAR,
    topic VARCHAR,
    payload VARCHAR,
    payloadEncoding VARCHAR,
    qos INT,
    retained BOOLEAN,
    clientId VARCHAR,
    brokerId VARCHAR
) WITH (
    KAFKA_TOPIC = 'mqtt.messages',
    KEY_FORMAT = 'KAFKA',
    VALUE_FORMAT = 'JSON'
);

-- Numbers alone: CAST of anything else would be null, and a line in the processing log for each record.
CREATE STREAM sensor_values WITH (KAFKA_TOPIC = 'mqtt.sensor_values') AS
SELECT
    mqtt_topic,
    topic,
    CAST(TRIM(payload) AS DOUBLE) AS value
FROM mqtt_messages
WHERE topic LIKE 'sensors/%'
    AND payloadEncoding IS NULL
    AND REGEXP_EXTRACT('^\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$', payload) IS NOT NULL
EMIT CHANGES;

-- WINDOW stands between FROM and GROUP BY. The key of a windowed table is topic and window; WINDOWSTART and WINDOWEND
-- are milliseconds. Grouped by the topic in the value, rows without a key count as well.
CREATE TABLE sensor_stats WITH (KAFKA_TOPIC = 'mqtt.sensor_stats') AS
SELECT
    topic,
    COUNT(*) AS message_count,
    AVG(value) AS avg_value,
    MIN(value) AS min_value,
    MAX(value) AS max_value,
    WINDOWSTART AS window_start,
    WINDOWEND AS window_end
FROM sensor_values
WINDOW TUMBLING (SIZE 5 MINUTES, GRACE PERIOD 1 MINUTE)
GROUP BY topic
EMIT CHANGES;

-- Each anomaly is an event, so this is a stream: a table needs an aggregation.
CREATE STREAM anomalies WITH (KAFKA_TOPIC = 'mqtt.ksql_anomalies') AS
SELECT
    mqtt_topic,
    topic,
    value,
    ROWTIME AS published_at
FROM sensor_values
WHERE value > 100 OR value < 0
EMIT CHANGES;
