/* drain PORT STREAMS TOKENS SECONDS: takes what the reference server sends and keeps nothing.
 *
 * So cheap a client shows the limits of the server itself, and the least that a client can cost: one epoll loop that
 * receives with the kernel's stamp, as a client must that tells when a token came. All connections are opened first; the
 * requests are spread evenly over SECONDS. Prints how many streams came to their end, and the CPU seconds from the first
 * request on.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 1024 };

static double seconds_of(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static int connect_to(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    int sock = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof address) < 0) {
        perror("drain: connect");
        exit(1);
    }
    setsockopt(sock, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
    return sock;
}

/* Receives once; 1 when the stream has come to its end, -1 when it broke off, else 0. */
static int receive(int sock) {
    static char data[65536], stamp[256];
    struct iovec buffer = {data, sizeof data};
    struct msghdr message = {.msg_iov = &buffer, .msg_iovlen = 1, .msg_control = stamp, .msg_controllen = sizeof stamp};
    ssize_t size = recvmsg(sock, &message, 0);
    if (size <= 0) return -1;
    return size >= 5 && !memcmp(data + size - 5, "0\r\n\r\n", 5);
}

int main(int count, char **arguments) {
    if (count != 5) {
        fprintf(stderr, "usage: drain PORT STREAMS TOKENS SECONDS\n");
        return 2;
    }
    int port = atoi(arguments[1]), streams = atoi(arguments[2]), tokens = atoi(arguments[3]);
    double spread = atof(arguments[4]);
    char body[256], request[512];
    sprintf(body, "{\"model\": \"drain\", \"prompt\": [300], \"max_tokens\": %d, \"stream\": true}", tokens);
    int length = sprintf(request, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
    int epoll = epoll_create1(0), *socks = malloc(sizeof(int) * (size_t)streams);
    for (int i = 0; i < streams; i++) {
        socks[i] = connect_to(port);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = socks[i]};
        epoll_ctl(epoll, EPOLL_CTL_ADD, socks[i], &event);
    }
    double begun = seconds_of(CLOCK_MONOTONIC), cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
    int sent = 0, left = streams, ended = 0;
    while (left) {
        double due = begun + sent * spread / streams;
        while (sent < streams && seconds_of(CLOCK_MONOTONIC) >= due) {
            if (write(socks[sent++], request, (size_t)length) != length) return 1;
            due = begun + sent * spread / streams;
        }
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, sent < streams ? 1 : -1);
        for (int i = 0; i < ready; i++) {
            int how = receive(events[i].data.fd);
            if (!how) continue;
            ended += how > 0;
            left--;
            close(events[i].data.fd);
        }
    }
    printf("%d %.6f\n", ended, seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu);
    return 0;
}
