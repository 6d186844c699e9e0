import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.time.Duration;
import java.util.Properties;
import java.util.concurrent.atomic.AtomicLong;
import java.util.regex.Pattern;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.KeyValue;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.KStream;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.kstream.TimeWindows;
import org.apache.kafka.streams.processor.api.ContextualProcessor;
import org.apache.kafka.streams.processor.api.Record;

/** Windows of five minutes and anomalies of the values below sensors/, as a Kafka Streams topology. */
public final class SensorStreams {
    private static final ObjectMapper JSON = new ObjectMapper();
    private static final Duration WINDOW = Duration.ofMinutes(5);
    private static final Duration GRACE = Duration.ofMinutes(1);
    private static final Pattern NUMBER =
            Pattern.compile("\\s*[+-]?([0-9]+(\\.[0-9]*)?|\\.[0-9]+)([eE][+-]?[0-9]+)?\\s*");
    private static final AtomicLong SKIPPED = new AtomicLong();

    private SensorStreams() {}

    /** What the values of a window come to so far. */
    public record Aggregate(long count, double sum, double min, double max) {
        static Aggregate none() {
            return new Aggregate(0, 0.0, Double.POSITIVE_INFINITY, Double.NEGATIVE_INFINITY);
        }

        Aggregate with(double value) {
            return new Aggregate(count + 1, sum + value, Math.min(min, value), Math.max(max, value));
        }
    }

    /** The value of a record, or null where it has none. */
    static Double valueOf(byte[] record) {
        try {
            JsonNode message = JSON.readTree(record);
            JsonNode payload = message == null ? null : message.get("payload");
            if (payload != null && payload.isTextual() && !message.has("payloadEncoding")
                    && NUMBER.matcher(payload.textValue()).matches()) {
                double value = Double.parseDouble(payload.textValue().strip());
                if (Double.isFinite(value)) {
                    return value;
                }
            }
        } catch (IOException malformed) {
            // counted below
        }
        SKIPPED.incrementAndGet();
        return null;
    }

    static Topology topology(String source, String aggregates, String anomalies) {
        StreamsBuilder builder = new StreamsBuilder();
        KStream<String, Double> values = builder
                .stream(source, Consumed.with(Serdes.String(), Serdes.ByteArray()))
                .filter((topic, record) -> topic != null && topic.startsWith("sensors/") && record != null)
                .mapValues(record -> valueOf(record))
                .filter((topic, value) -> value != null);
        values.groupByKey(Grouped.with(Serdes.String(), Serdes.Double()))
                .windowedBy(TimeWindows.ofSizeAndGrace(WINDOW, GRACE))
                .aggregate(
                        Aggregate::none,
                        (topic, value, aggregate) -> aggregate.with(value),
                        Materialized.with(Serdes.String(), serde()))
                .toStream()
                .map((key, aggregate) -> {
                    ObjectNode result = JSON.createObjectNode();
                    result.put("topic", key.key());
                    result.put("windowStart", key.window().start());
                    result.put("windowEnd", key.window().end());
                    result.put("count", aggregate.count());
                    result.put("avg", aggregate.sum() / aggregate.count());
                    result.put("min", aggregate.min());
                    result.put("max", aggregate.max());
                    return KeyValue.pair(key.key(), result.toString());
                })
                .to(aggregates, Produced.with(Serdes.String(), Serdes.String()));
        values.filter((topic, value) -> value > 100 || value < 0)
                .process(AnomalyWriter::new)
                .to(anomalies, Produced.with(Serdes.String(), Serdes.String()));
        return builder.build();
    }

    /** Adds the time of the record, which only a processor knows. */
    private static final class AnomalyWriter extends ContextualProcessor<String, Double, String, String> {
        @Override
        public void process(Record<String, Double> record) {
            ObjectNode result = JSON.createObjectNode();
            result.put("topic", record.key());
            result.put("value", record.value());
            result.put("timestamp", record.timestamp());
            context().forward(record.withValue(result.toString()));
        }
    }

    private static Serde<Aggregate> serde() {
        return Serdes.serdeFrom(
                (topic, aggregate) -> {
                    try {
                        return aggregate == null ? null : JSON.writeValueAsBytes(new double[] {
                            aggregate.count(), aggregate.sum(), aggregate.min(), aggregate.max()});
                    } catch (IOException impossible) {
                        throw new UncheckedIOException(impossible);
                    }
                },
                (topic, bytes) -> {
                    try {
                        if (bytes == null) {
                            return null;
                        }
                        double[] parts = JSON.readValue(bytes, double[].class);
                        return new Aggregate((long) parts[0], parts[1], parts[2], parts[3]);
                    } catch (IOException malformed) {
                        throw new UncheckedIOException(malformed);
                    }
                });
    }

    /** Arguments: servers, application id, source, aggregates, anomalies, state directory. SIGTERM ends it. */
    public static void main(String[] arguments) {
        Properties properties = new Properties();
        properties.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, arguments[0]);
        properties.put(StreamsConfig.APPLICATION_ID_CONFIG, arguments[1]);
        properties.put(StreamsConfig.STATE_DIR_CONFIG, arguments[5]);
        properties.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 200);
        properties.put("auto.offset.reset", "earliest");
        KafkaStreams streams = new KafkaStreams(topology(arguments[2], arguments[3], arguments[4]), properties);
        streams.setUncaughtExceptionHandler(error -> {
            error.printStackTrace();
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            streams.close(Duration.ofSeconds(20));
            System.out.println("skipped " + SKIPPED.get());
        }));
        streams.start();
        System.out.println("started");
    }
}
