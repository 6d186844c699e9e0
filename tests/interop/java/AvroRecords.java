import java.io.ByteArrayOutputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Base64;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericData;
import org.apache.avro.generic.GenericDatumReader;
import org.apache.avro.generic.GenericDatumWriter;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.io.BinaryDecoder;
import org.apache.avro.io.BinaryEncoder;
import org.apache.avro.io.DecoderFactory;
import org.apache.avro.io.EncoderFactory;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/**
 * Java's Avro, Kafka's Java client and a schema registry, on records of mqtt_trio and for it.
 *
 * <pre>
 * java -cp ... AvroRecords.java read SERVERS REGISTRY TOPIC COUNT   prints COUNT records, one JSON object a line
 * java -cp ... AvroRecords.java write SERVERS REGISTRY TOPIC        writes what comes so on standard input
 * </pre>
 */
public final class AvroRecords {
    private static final ObjectMapper JSON = new ObjectMapper();
    private static final HttpClient HTTP = HttpClient.newHttpClient();

    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        properties.put("bootstrap.servers", arguments[1]);
        if (arguments[0].equals("read")) {
            read(properties, arguments[2], arguments[3], Integer.parseInt(arguments[4]));
        } else {
            write(properties, arguments[2], arguments[3]);
        }
    }

    private static void read(Properties properties, String registry, String topic, int count) throws Exception {
        Map<Integer, Schema> schemas = new HashMap<>();
        int found = 0;
        long limit = System.nanoTime() + Duration.ofSeconds(60).toNanos();
        try (var consumer = new KafkaConsumer<>(properties, new ByteArrayDeserializer(), new ByteArrayDeserializer())) {
            List<TopicPartition> partitions = new ArrayList<>();
            consumer.partitionsFor(topic).forEach(each -> partitions.add(new TopicPartition(topic, each.partition())));
            consumer.assign(partitions);
            consumer.seekToBeginning(partitions);
            while (found < count && System.nanoTime() < limit) {
                for (ConsumerRecord<byte[], byte[]> record : consumer.poll(Duration.ofMillis(200))) {
                    System.out.println(JSON.writeValueAsString(decode(record, registry, schemas)));
                    found++;
                }
            }
        }
    }

    private static Map<String, Object> decode(
            ConsumerRecord<byte[], byte[]> record, String registry, Map<Integer, Schema> schemas) throws Exception {
        ByteBuffer value = ByteBuffer.wrap(record.value());
        if (value.get() != 0) {
            throw new IllegalStateException("no magic byte");
        }
        int id = value.getInt();
        Schema schema = schemas.get(id);
        if (schema == null) {
            schema = new Schema.Parser().parse(ask(registry + "/schemas/ids/" + id).get("schema").asText());
            schemas.put(id, schema);
        }
        BinaryDecoder decoder = DecoderFactory.get().binaryDecoder(record.value(), 5, record.value().length - 5, null);
        GenericRecord datum = new GenericDatumReader<GenericRecord>(schema).read(null, decoder);
        if (!decoder.isEnd()) {
            throw new IllegalStateException("bytes behind the datum");
        }
        Map<String, Object> fields = new HashMap<>();
        fields.put("schema", schema.getFullName());
        fields.put("key", new String(record.key(), StandardCharsets.UTF_8));
        fields.put("timestamp", datum.get("timestamp"));
        fields.put("topic", datum.get("topic").toString());
        ByteBuffer payload = (ByteBuffer) datum.get("payload");
        byte[] bytes = new byte[payload.remaining()];
        payload.get(bytes);
        fields.put("payload", Base64.getEncoder().encodeToString(bytes));
        fields.put("qos", datum.get("qos"));
        fields.put("retained", datum.get("retained"));
        fields.put("clientId", datum.get("clientId") == null ? null : datum.get("clientId").toString());
        return fields;
    }

    private static void write(Properties properties, String registry, String topic) throws Exception {
        JsonNode latest = ask(registry + "/subjects/" + topic + "-value/versions/latest");
        Schema schema = new Schema.Parser().parse(latest.get("schema").asText());
        properties.put("acks", "all");
        try (var producer = new KafkaProducer<>(properties, new ByteArraySerializer(), new ByteArraySerializer());
                var lines = JSON.readerFor(JsonNode.class).<JsonNode>readValues(System.in)) {
            while (lines.hasNext()) {
                JsonNode line = lines.next();
                GenericRecord datum = new GenericData.Record(schema);
                datum.put("timestamp", line.get("timestamp").asLong());
                datum.put("topic", line.get("topic").asText());
                datum.put("payload", ByteBuffer.wrap(Base64.getDecoder().decode(line.get("payload").asText())));
                datum.put("qos", line.get("qos").asInt());
                datum.put("retained", line.get("retained").asBoolean());
                datum.put("clientId", line.get("clientId").isNull() ? null : line.get("clientId").asText());
                ByteArrayOutputStream value = new ByteArrayOutputStream();
                value.write(ByteBuffer.allocate(5).put((byte) 0).putInt(latest.get("id").asInt()).array());
                BinaryEncoder encoder = EncoderFactory.get().binaryEncoder(value, null);
                new GenericDatumWriter<GenericRecord>(schema).write(datum, encoder);
                encoder.flush();
                byte[] key = line.get("topic").asText().getBytes(StandardCharsets.UTF_8);
                producer.send(new ProducerRecord<>(topic, key, value.toByteArray())).get();
            }
        }
    }

    private static JsonNode ask(String url) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url)).build();
        HttpResponse<String> response = HTTP.send(request, HttpResponse.BodyHandlers.ofString());
        if (response.statusCode() != 200) {
            throw new IllegalStateException(url + ": " + response.statusCode() + " " + response.body());
        }
        return JSON.readTree(response.body());
    }

    private AvroRecords() {}
}
