// mqttload: a closed-loop MQTT load generator for one broker (or two nodes) on loopback.
//
// One thread and one epoll loop, so that it costs far less CPU than the broker it measures. Every PUBLISH carries its
// publisher and its send time. A publisher may have at most --window messages that its subscribers have not all
// received, so a broker cannot win by dropping. With --rate the publishers send at a fixed pace instead (open loop), to
// read the latency under load. The results are one line of JSON on standard output.
//
//     cc -O2 -o mqttload mqttload.c
//     mqttload --port 1883 --mode p2p|fanin|fanout|ack --pubs 10 --subs 10 --qos 0 --size 64 --window 100 --seconds 5
//              [--warm 1] [--rate MESSAGES_PER_S] [--v5] [--ws [--path /mqtt]] [--pid BROKER_PID] [--idle CONNECTIONS]
//              [--sub-port PORT]  subscribers on another node
//              [--prefix bench]   what the topics begin with
//              [--single]         every PUBLISH in a write of its own, as devices send them
//              [--kept]           subscribers with sessions that outlive their connections
//
// With --mode ack there are no subscribers: a message (QoS 1 or 2) counts as delivered when it is acknowledged.
//
// Exit codes: 0 measured; 1 nothing was delivered; 2 usage, or the broker refused or closed something.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000ull
#define READ_SIZE 65536           // bytes asked of the kernel at once
#define WRITE_LIMIT 262144        // bytes a publisher may have waiting before it stops filling its window
#define MINIMUM_PAYLOAD 12        // send time (8 bytes) and publisher (4)
#define BUCKET_NS 10000           // width of a latency bucket
#define BUCKETS 200000            // up to 2 s; later ones count as the last
#define READY_TIMEOUT_S 60
#define IDLE_TIMEOUT_S 120
#define IDLE_ID 100000            // client ids of idle connections start here

enum packet_type {
    CONNACK = 2, PUBLISH = 3, PUBACK = 4, PUBREC = 5, PUBREL = 6, PUBCOMP = 7, SUBACK = 9, DISCONNECT = 14
};
enum mode { P2P, FANIN, FANOUT, ACK };

static struct {
    enum mode mode;
    int pubs, subs, qos, size, window, port, sub_port, idle;
    bool v5, ws, single, kept;
    double seconds, warm, rate;
    long pid;
    const char *path, *prefix;
} opt = {
    .mode = P2P, .pubs = 1, .subs = 1, .size = 64, .window = 100, .port = 1883, .seconds = 5, .warm = 1, .path = "/mqtt",
    .prefix = "bench"
};

struct buffer {
    uint8_t *data;
    size_t length, capacity;
};

struct connection {
    int fd, id;
    bool is_subscriber, ready, ws_open, want_write;
    struct buffer in, out, mqtt;  // mqtt: bytes unwrapped from WebSocket frames
    size_t out_sent;              // bytes of `out` that the kernel already has
    uint16_t packet_id;
    uint64_t sent, delivered;
    uint64_t *sent_at;  // by packet id, with --mode ack
};

static struct connection *connections;
static struct connection **publishers;  // by id; NULL until connected
static int connection_count, epoll_fd;
static int ready_subscribers, ready_publishers;
static uint64_t total_sent, total_delivered;
static uint64_t *histogram;
static bool measuring;
static uint8_t *payload;

// --- small things ----------------------------------------------------------------------------------------------------

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("mqttload: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) die("out of memory");
    return memory;
}

static void reserve(struct buffer *b, size_t more) {
    if (b->length + more <= b->capacity) return;
    size_t capacity = b->capacity ? b->capacity : 4096;
    while (capacity < b->length + more) capacity *= 2;
    if (!(b->data = realloc(b->data, capacity))) die("out of memory");
    b->capacity = capacity;
}

static void append(struct buffer *b, const void *data, size_t count) {
    reserve(b, count);
    memcpy(b->data + b->length, data, count);
    b->length += count;
}

static void consume(struct buffer *b, size_t count) {
    if (!count) return;
    memmove(b->data, b->data + count, b->length - count);
    b->length -= count;
}

// --- output ----------------------------------------------------------------------------------------------------------

static void watch(struct connection *c, bool write) {
    if (c->want_write == write) return;
    c->want_write = write;
    struct epoll_event event = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

static void flush(struct connection *c) {
    while (c->out_sent < c->out.length) {
        ssize_t count = send(c->fd, c->out.data + c->out_sent, c->out.length - c->out_sent, MSG_NOSIGNAL);
        if (count < 0) {
            if (errno != EAGAIN) die("send: %s", strerror(errno));
            watch(c, true);
            return;
        }
        c->out_sent += (size_t)count;
    }
    c->out.length = c->out_sent = 0;
    watch(c, false);
}

// Append MQTT bytes to the output: as they are, or as one masked binary WebSocket frame.
static void put(struct connection *c, const uint8_t *data, size_t count) {
    if (!opt.ws) {
        append(&c->out, data, count);
        return;
    }
    static const uint8_t mask[4] = {1, 2, 3, 4};
    uint8_t head[8] = {0x82};
    size_t k = 1;
    if (count < 126) {
        head[k++] = 0x80 | (uint8_t)count;
    } else if (count < 65536) {
        head[k++] = 0x80 | 126;
        head[k++] = (uint8_t)(count >> 8);
        head[k++] = (uint8_t)count;
    } else {
        die("--size is too large for one of our WebSocket frames");
    }
    memcpy(head + k, mask, sizeof mask);
    append(&c->out, head, k + sizeof mask);
    size_t at = c->out.length;
    append(&c->out, data, count);
    for (size_t i = 0; i < count; i++) c->out.data[at + i] ^= mask[i & 3];
}

// Write a packet's first byte and Remaining Length; return where the rest begins.
static uint8_t *put_header(uint8_t *p, uint8_t first, size_t remaining) {
    *p++ = first;
    do {
        *p++ = (uint8_t)((remaining & 127) | (remaining > 127 ? 128 : 0));
    } while (remaining >>= 7);
    return p;
}

static uint8_t *put_u16(uint8_t *p, unsigned value) {
    *p++ = (uint8_t)(value >> 8);
    *p++ = (uint8_t)value;
    return p;
}

static uint8_t *put_string(uint8_t *p, const char *text, int length) {
    p = put_u16(p, (unsigned)length);
    memcpy(p, text, (size_t)length);
    return p + length;
}

static void send_connect(struct connection *c) {
    char client_id[48];
    char kind = c->is_subscriber ? 's' : 'p';
    int length = snprintf(client_id, sizeof client_id, "load-%c%d-%d", kind, c->id, getpid() % 10000);
    uint8_t packet[128];
    bool kept = opt.kept && c->is_subscriber;
    size_t properties = opt.v5 ? 1 + (kept ? 5 : 0) : 0;
    uint8_t *p = put_header(packet, 0x10, 10 + properties + 2 + (size_t)length);
    p = put_string(p, "MQTT", 4);
    *p++ = opt.v5 ? 5 : 4;
    *p++ = kept ? 0 : 2;  // clean start
    p = put_u16(p, 0);    // no keep alive
    if (opt.v5) {
        *p++ = kept ? 5 : 0;
        if (kept) {
            *p++ = 0x11;  // Session Expiry Interval: an hour
            p = put_u16(p, 0);
            p = put_u16(p, 3600);
        }
    }
    p = put_string(p, client_id, length);
    put(c, packet, (size_t)(p - packet));
    flush(c);
}

static void send_subscribe(struct connection *c) {
    char filter[64];
    int length;
    if (opt.mode == P2P) length = snprintf(filter, sizeof filter, "%s/%d", opt.prefix, c->id);
    else if (opt.mode == FANOUT) length = snprintf(filter, sizeof filter, "%s/0", opt.prefix);
    else length = snprintf(filter, sizeof filter, "%s%s/#", opt.subs > 1 ? "$share/g/" : "", opt.prefix);
    uint8_t packet[128];
    uint8_t *p = put_header(packet, 0x82, 2 + opt.v5 + 2 + (size_t)length + 1);
    p = put_u16(p, 1);
    if (opt.v5) *p++ = 0;
    p = put_string(p, filter, length);
    *p++ = (uint8_t)opt.qos;
    put(c, packet, (size_t)(p - packet));
    flush(c);
}

static void send_publish(struct connection *c) {
    static uint8_t *packet;
    if (!packet) packet = allocate((size_t)opt.size + 128, 1);
    char topic[64];
    int length = snprintf(topic, sizeof topic, "%s/%d", opt.prefix, opt.mode == FANOUT ? 0 : c->id);
    size_t remaining = 2 + (size_t)length + (opt.qos ? 2 : 0) + opt.v5 + (size_t)opt.size;
    uint8_t *p = put_header(packet, (uint8_t)(0x30 | opt.qos << 1), remaining);
    p = put_string(p, topic, length);
    if (opt.qos) {
        if (++c->packet_id == 0) c->packet_id = 1;
        p = put_u16(p, c->packet_id);
    }
    if (opt.v5) *p++ = 0;
    uint64_t sent_at = now_ns();
    if (c->sent_at) c->sent_at[c->packet_id] = sent_at;
    uint32_t publisher = (uint32_t)c->id;
    memcpy(payload, &sent_at, 8);
    memcpy(payload + 8, &publisher, 4);
    memcpy(p, payload, (size_t)opt.size);
    put(c, packet, (size_t)(p - packet) + (size_t)opt.size);
    c->sent++;
    total_sent++;
    if (opt.single) flush(c);
}

static void send_ack(struct connection *c, uint8_t first, const uint8_t *packet_id) {
    uint8_t packet[4] = {first, 2, packet_id[0], packet_id[1]};
    put(c, packet, sizeof packet);
}

// --- input -----------------------------------------------------------------------------------------------------------

static void count_delivery(struct connection *publisher, uint64_t sent_at) {
    publisher->delivered++;
    total_delivered++;
    if (measuring) {
        uint64_t bucket = (now_ns() - sent_at) / BUCKET_NS;
        histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    }
}

static void got_publish(struct connection *c, uint8_t first, const uint8_t *body, size_t length) {
    unsigned qos = first >> 1 & 3;
    size_t at = length < 2 ? length : 2 + (size_t)(body[0] << 8 | body[1]);
    const uint8_t *packet_id = body + at;
    if (qos) at += 2;
    if (opt.v5 && at < length) {  // skip the properties
        size_t properties = 0;
        unsigned shift = 0;
        uint8_t byte;
        do {
            byte = body[at++];
            properties |= (size_t)(byte & 127) << shift;
            shift += 7;
        } while ((byte & 128) && at < length && shift < 28);
        at += properties;
    }
    if (at + MINIMUM_PAYLOAD > length) die("received a PUBLISH that is too short");
    uint64_t sent_at;
    uint32_t publisher;
    memcpy(&sent_at, body + at, 8);
    memcpy(&publisher, body + at + 8, 4);
    if (publisher >= (uint32_t)opt.pubs) die("received a PUBLISH of an unknown publisher");
    if (!publishers[publisher]) return;  // left over from an earlier run
    count_delivery(publishers[publisher], sent_at);
    if (qos) send_ack(c, qos == 1 ? PUBACK << 4 : PUBREC << 4, packet_id);
}

static void got_packet(struct connection *c, uint8_t first, const uint8_t *body, size_t length) {
    switch (first >> 4) {
        case CONNACK:
            if (length < 2 || body[1]) die("CONNACK %d", length > 1 ? body[1] : -1);
            if (c->is_subscriber) {
                send_subscribe(c);
            } else if (!c->ready) {
                c->ready = true;
                ready_publishers++;
            }
            break;
        case SUBACK:
            if (!length || body[length - 1] > 2) die("SUBACK %d", length ? body[length - 1] : -1);
            c->ready = true;
            ready_subscribers++;
            break;
        case PUBLISH: got_publish(c, first, body, length); break;
        case PUBREC:
            if (length >= 2) send_ack(c, PUBREL << 4 | 2, body);
            break;
        case PUBREL:
            if (length >= 2) send_ack(c, PUBCOMP << 4, body);
            break;
        case DISCONNECT: die("DISCONNECT %d", length ? body[0] : 0);
        case PUBACK:
        case PUBCOMP:  // else the loop is closed by deliveries
            if (c->sent_at && length >= 2) {
                if (length > 2 && body[2] >= 0x80) die("a negative acknowledgement, 0x%02x", body[2]);
                count_delivery(c, c->sent_at[body[0] << 8 | body[1]]);
            }
            break;
        default: break;
    }
}

// Handle the whole packets in `data`; return how many bytes they took.
static size_t parse_mqtt(struct connection *c, const uint8_t *data, size_t count) {
    size_t done = 0;
    while (count - done >= 2) {
        size_t length = 0, at = done + 1;
        unsigned shift = 0;
        bool whole = false;
        while (at < count && !whole) {
            uint8_t byte = data[at++];
            length |= (size_t)(byte & 127) << shift;
            shift += 7;
            whole = !(byte & 128);
        }
        if (!whole || count - at < length) break;
        got_packet(c, data[done], data + at, length);
        done = at + length;
    }
    return done;
}

// Take the response to the upgrade; return how many bytes it took, 0 while it is not whole.
static size_t parse_upgrade(struct connection *c) {
    uint8_t *end = memmem(c->in.data, c->in.length, "\r\n\r\n", 4);
    if (!end) return 0;
    if (memcmp(c->in.data, "HTTP/1.1 101", 12)) die("the WebSocket upgrade was refused: %.12s", (char *)c->in.data);
    c->ws_open = true;
    send_connect(c);
    return (size_t)(end - c->in.data) + 4;
}

// Unwrap whole WebSocket frames into c->mqtt.
static void parse_frames(struct connection *c) {
    size_t done = c->ws_open ? 0 : parse_upgrade(c);
    while (c->ws_open && c->in.length - done >= 2) {
        const uint8_t *frame = c->in.data + done;
        size_t have = c->in.length - done, head = 2;
        uint64_t length = frame[1] & 127;
        if (length == 126) {
            if (have < (head = 4)) break;
            length = (uint64_t)(frame[2] << 8 | frame[3]);
        } else if (length == 127) {
            if (have < (head = 10)) break;
            length = 0;
            for (int i = 0; i < 8; i++) length = length << 8 | frame[2 + i];
        }
        if (have < head + length) break;
        unsigned opcode = frame[0] & 15;
        if (opcode == 8) die("the broker closed a WebSocket");
        if (opcode <= 2) append(&c->mqtt, frame + head, length);
        done += head + length;
    }
    consume(&c->in, done);
}

static void readable(struct connection *c) {
    reserve(&c->in, READ_SIZE);
    ssize_t count = recv(c->fd, c->in.data + c->in.length, READ_SIZE, 0);
    if (count < 0) {
        if (errno == EAGAIN) return;
        die("recv: %s", strerror(errno));
    }
    if (!count) die("the broker closed a connection");
    c->in.length += (size_t)count;
    if (opt.ws) {
        parse_frames(c);
        consume(&c->mqtt, parse_mqtt(c, c->mqtt.data, c->mqtt.length));
    } else {
        consume(&c->in, parse_mqtt(c, c->in.data, c->in.length));
    }
    if (c->out.length > c->out_sent && !c->want_write) flush(c);
}

// Wait at most `timeout_ms` and handle what is ready.
static void turn(int timeout_ms) {
    struct epoll_event events[256];
    int count = epoll_wait(epoll_fd, events, 256, timeout_ms);
    for (int i = 0; i < count; i++) {
        struct connection *c = events[i].data.ptr;
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
        if (events[i].events & EPOLLOUT) flush(c);
    }
}

// --- connections -----------------------------------------------------------------------------------------------------

static struct connection *open_connection(bool is_subscriber, int id) {
    struct connection *c = &connections[connection_count++];
    c->is_subscriber = is_subscriber;
    c->id = id;
    if ((c->fd = socket(AF_INET, SOCK_STREAM, 0)) < 0) die("socket: %s", strerror(errno));
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    int port = is_subscriber && opt.sub_port ? opt.sub_port : opt.port;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address))
        die("connect to port %d: %s", port, strerror(errno));
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
    if (!opt.ws) {
        send_connect(c);
        return c;
    }
    char request[512];
    int length = snprintf(request, sizeof request,
                          "GET %s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                          "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
                          "Sec-WebSocket-Protocol: mqtt\r\n\r\n",
                          opt.path);
    append(&c->out, request, (size_t)length);
    flush(c);
    return c;
}

static void wait_ready(const int *ready, int wanted, const char *what, unsigned timeout_s) {
    uint64_t start = now_ns();
    while (*ready < wanted) {
        turn(100);
        if (now_ns() - start > timeout_s * NS_PER_S) die("%s not ready in %u s", what, timeout_s);
    }
}

static void open_all(void) {
    for (int i = 0; i < opt.subs; i++) {
        open_connection(true, i);
        turn(0);
    }
    wait_ready(&ready_subscribers, opt.subs, "subscribers", READY_TIMEOUT_S);
    for (int i = 0; i < opt.pubs; i++) {
        publishers[i] = open_connection(false, i);
        if (opt.mode == ACK) publishers[i]->sent_at = allocate(65536, sizeof(uint64_t));
        turn(0);
    }
    wait_ready(&ready_publishers, opt.pubs, "publishers", READY_TIMEOUT_S);
}

// --- measuring -------------------------------------------------------------------------------------------------------

struct usage {
    double cpu_s;
    long rss_kb;
};

// CPU time and resident memory of the broker, zeros without --pid.
static struct usage broker_usage(void) {
    struct usage usage = {0, 0};
    char name[64], text[2048];
    if (!opt.pid) return usage;
    snprintf(name, sizeof name, "/proc/%ld/stat", opt.pid);
    FILE *file = fopen(name, "r");
    if (!file) return usage;
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    unsigned long user = 0, system = 0;
    const char *fields = strrchr(text, ')');  // the name before it may hold anything
    if (fields) sscanf(fields + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
    usage.cpu_s = (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
    snprintf(name, sizeof name, "/proc/%ld/status", opt.pid);
    if (!(file = fopen(name, "r"))) return usage;
    while (fgets(text, sizeof text, file))
        if (!strncmp(text, "VmRSS:", 6)) usage.rss_kb = atol(text + 6);
    fclose(file);
    return usage;
}

static double percentile_us(double part) {
    uint64_t total = 0, seen = 0;
    for (int i = 0; i < BUCKETS; i++) total += histogram[i];
    for (int i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if (seen && (double)seen >= (double)total * part) return i * (BUCKET_NS / 1000.0);
    }
    return 0;
}

static void measure_idle(void) {
    struct usage before = broker_usage();
    uint64_t start = now_ns();
    for (int i = 0; i < opt.idle; i++) {
        open_connection(false, IDLE_ID + i);
        if (!(i & 15)) turn(0);
    }
    wait_ready(&ready_publishers, opt.pubs + opt.idle, "idle connections", IDLE_TIMEOUT_S);
    double seconds = (double)(now_ns() - start) / NS_PER_S;
    struct usage after = broker_usage();
    printf("{\"idle_connections\": %d, \"seconds\": %.3f, \"connects_per_s\": %.0f, "
           "\"broker_cpu_us_per_connect\": %.1f, \"rss_kb_per_connection\": %.2f, \"rss_mb\": %.1f}\n",
           opt.idle, seconds, opt.idle / seconds, (after.cpu_s - before.cpu_s) * 1e6 / opt.idle,
           (double)(after.rss_kb - before.rss_kb) / opt.idle, (double)after.rss_kb / 1024.0);
}

// Open loop: send what is due by now.
static void publish_due(uint64_t start, uint64_t now) {
    static int next;
    double due = (double)(now - start) * opt.rate / NS_PER_S;
    while ((double)total_sent < due) {
        struct connection *c = publishers[next++ % opt.pubs];
        send_publish(c);
        if (!c->want_write) flush(c);
    }
}

// Closed loop: fill every window.
static void publish_windows(uint64_t fan) {
    for (int i = 0; i < opt.pubs; i++) {
        struct connection *c = publishers[i];
        bool any = false;
        if (c->want_write) continue;
        while ((int64_t)(c->sent - c->delivered / fan) < opt.window && c->out.length < WRITE_LIMIT) {
            send_publish(c);
            any = true;
        }
        if (any) flush(c);
    }
}

static int measure_load(void) {
    uint64_t fan = opt.mode == FANOUT ? (uint64_t)opt.subs : 1;
    uint64_t start = now_ns(), measured_from = start, delivered = 0, sent = 0, now;
    struct usage before = {0, 0};
    for (;;) {
        now = now_ns();
        double elapsed = (double)(now - start) / NS_PER_S;
        if (!measuring && elapsed >= opt.warm) {
            measuring = true;
            measured_from = now;
            delivered = total_delivered;
            sent = total_sent;
            before = broker_usage();
        }
        if (elapsed >= opt.warm + opt.seconds) break;
        if (opt.rate > 0) publish_due(start, now);
        else publish_windows(fan);
        turn(opt.rate > 0 ? 1 : 100);
    }
    struct usage after = broker_usage();
    double seconds = (double)(now - measured_from) / NS_PER_S, cpu_s = after.cpu_s - before.cpu_s;
    delivered = total_delivered - delivered;
    sent = total_sent - sent;
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    double own_cpu_s = (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec);
    own_cpu_s += (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6;
    printf("{\"delivered\": %" PRIu64 ", \"seconds\": %.3f, \"delivered_per_s\": %.0f, \"sent_per_s\": %.0f, "
           "\"p50_us\": %.0f, \"p99_us\": %.0f, \"p999_us\": %.0f, \"broker_cpu_us_per_delivery\": %.3f, "
           "\"broker_cpu_share\": %.2f, \"rss_mb\": %.1f, \"backlog\": %" PRId64 ", \"load_cpu_s\": %.2f}\n",
           delivered, seconds, (double)delivered / seconds, (double)sent / seconds,
           percentile_us(.5), percentile_us(.99), percentile_us(.999), delivered ? cpu_s * 1e6 / (double)delivered : 0,
           cpu_s / seconds, (double)after.rss_kb / 1024.0, (int64_t)(total_sent * fan - total_delivered), own_cpu_s);
    return delivered ? 0 : 1;
}

// --- command line ----------------------------------------------------------------------------------------------------

static void parse_options(int count, char **arguments) {
    const struct { const char *name; int *value; } numbers[] = {
        {"--port", &opt.port}, {"--sub-port", &opt.sub_port}, {"--pubs", &opt.pubs}, {"--subs", &opt.subs},
        {"--qos", &opt.qos}, {"--size", &opt.size}, {"--window", &opt.window}, {"--idle", &opt.idle}};
    const struct { const char *name; double *value; } reals[] = {
        {"--seconds", &opt.seconds}, {"--warm", &opt.warm}, {"--rate", &opt.rate}};
    const struct { const char *name; bool *value; } switches[] = {
        {"--v5", &opt.v5}, {"--ws", &opt.ws}, {"--single", &opt.single}, {"--kept", &opt.kept}};
    for (int i = 1; i < count; i++) {
        const char *name = arguments[i];
        bool known = false;
        for (size_t k = 0; k < sizeof switches / sizeof *switches; k++)
            if (!strcmp(name, switches[k].name)) known = *switches[k].value = true;
        if (known) continue;
        if (++i == count) die("%s: unknown, or its value is missing", name);
        const char *value = arguments[i];
        for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
            if (!strcmp(name, numbers[k].name)) *numbers[k].value = atoi(value), known = true;
        for (size_t k = 0; k < sizeof reals / sizeof *reals; k++)
            if (!strcmp(name, reals[k].name)) *reals[k].value = atof(value), known = true;
        if (!strcmp(name, "--pid")) opt.pid = atol(value);
        else if (!strcmp(name, "--path")) opt.path = value;
        else if (!strcmp(name, "--prefix")) opt.prefix = value;
        else if (strcmp(name, "--mode")) { if (!known) die("unknown option %s", name); }
        else if (!strcmp(value, "p2p")) opt.mode = P2P;
        else if (!strcmp(value, "fanin")) opt.mode = FANIN;
        else if (!strcmp(value, "fanout")) opt.mode = FANOUT;
        else if (!strcmp(value, "ack")) opt.mode = ACK;
        else die("--mode %s: expected p2p, fanin, fanout or ack", value);
    }
    if (strlen(opt.prefix) > 30) die("--prefix is too long");
    if (opt.size < MINIMUM_PAYLOAD) opt.size = MINIMUM_PAYLOAD;
    if (opt.mode == P2P) opt.subs = opt.pubs;
    if (opt.mode == FANOUT) opt.pubs = 1;
    if (opt.mode == ACK) opt.subs = 0;
    if (opt.mode == ACK && (!opt.qos || opt.window > 65535)) die("--mode ack needs QoS 1 or 2, and packet ids");
    if (opt.pubs < 1 || opt.subs < (opt.mode != ACK) || opt.window < 1 || opt.qos < 0 || opt.qos > 2 || opt.idle < 0)
        die("a value is out of range");
}

int main(int count, char **arguments) {
    parse_options(count, arguments);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    payload = allocate((size_t)opt.size, 1);
    memset(payload, 'x', (size_t)opt.size);
    histogram = allocate(BUCKETS, sizeof *histogram);
    connections = allocate((size_t)(opt.pubs + opt.subs + opt.idle), sizeof *connections);
    publishers = allocate((size_t)opt.pubs, sizeof *publishers);
    if ((epoll_fd = epoll_create1(0)) < 0) die("epoll: %s", strerror(errno));
    open_all();
    if (opt.idle) measure_idle();
    return opt.seconds > 0 ? measure_load() : 0;
}
