import java.util.Map;
import java.util.concurrent.TimeUnit;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.StringSerializer;
import org.springframework.context.annotation.AnnotationConfigApplicationContext;
import org.springframework.context.annotation.Bean;
import org.springframework.context.annotation.Configuration;
import org.springframework.kafka.core.DefaultKafkaProducerFactory;
import org.springframework.kafka.core.KafkaTemplate;
import org.springframework.kafka.support.serializer.JsonSerializer;

/** Messages by Spring's KafkaTemplate, with the header __TypeId__ that its serializer adds. */
public final class TemplateProducer {
    private static String servers;

    private TemplateProducer() {}

    /** What a program has to say of a message. */
    public record MqttMessage(String timestamp, String topic, String payload, int qos, boolean retained) {}

    /** The bean that a program asks for. */
    @Configuration
    public static class Beans {
        @Bean(destroyMethod = "destroy")
        public KafkaTemplate<String, MqttMessage> template() {
            Map<String, Object> properties = Map.of(
                    ProducerConfig.BOOTSTRAP_SERVERS_CONFIG, servers,
                    ProducerConfig.KEY_SERIALIZER_CLASS_CONFIG, StringSerializer.class,
                    ProducerConfig.VALUE_SERIALIZER_CLASS_CONFIG, JsonSerializer.class);
            return new KafkaTemplate<>(new DefaultKafkaProducerFactory<>(properties));
        }
    }

    /** Arguments: servers, Kafka topic, MQTT topic, how many. */
    public static void main(String[] arguments) throws Exception {
        servers = arguments[0];
        try (AnnotationConfigApplicationContext context = new AnnotationConfigApplicationContext(Beans.class)) {
            @SuppressWarnings("unchecked")
            KafkaTemplate<String, MqttMessage> template = context.getBean(KafkaTemplate.class);
            for (int number = 0; number < Integer.parseInt(arguments[3]); number++) {
                MqttMessage message =
                        new MqttMessage("2024-01-15T10:30:00Z", arguments[2], "message " + number, number % 3, false);
                template.send(arguments[1], arguments[2], message).get(30, TimeUnit.SECONDS);
            }
        }
        System.out.println("sent");
    }
}
