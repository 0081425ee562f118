// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The lab's command agent: runs what the host asks for, over a serial port.
 *
 *	agent /dev/ttyS1
 *
 * Both ways one line a message, its first word an identifier that the host
 * chose (up to 15 characters), its second a verb.
 *
 *	host to guest			guest to host
 *	ID run COMMAND			ID pid PID
 *	ID in TEXT			ID out TEXT	a whole line of output
 *	ID eof				ID part TEXT	one without its end
 *	ID kill SIGNAL			ID exit STATUS	128 + signal if it died
 *	ID ping				ID pong BOOT_ID
 *					ID error TEXT
 *					- ready BOOT_ID	once, when it starts
 *
 * A command is run by "sh -c" in a process group of its own; its standard
 * output and error are one pipe. In TEXT, bytes outside printable ASCII and
 * the backslash itself are written as \xHH. A command is over when the shell
 * is, even if a child in the background still holds the pipe.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define MAX_JOBS 32
#define MAX_LINE 4096

struct job {
	char id[16];		/* empty: the place is free */
	pid_t pid;
	int in;			/* the command's stdin, -1 when closed */
	int out;		/* its stdout and stderr, -1 when closed */
	char line[512];		/* output not yet sent, without a line's end */
	size_t used;
};

static struct job jobs[MAX_JOBS];
static int tty;
static int child_died[2];
static char boot_id[64];

static void die(const char *what)
{
	fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* One message in one write, so that nothing can come between its bytes. */
__attribute__((format(printf, 2, 3)))
static void send_line(const char *id, const char *format, ...)
{
	char buf[MAX_LINE];
	va_list args;
	size_t len, done = 0;

	len = snprintf(buf, sizeof(buf), "%s ", id);
	va_start(args, format);
	len += vsnprintf(buf + len, sizeof(buf) - len - 1, format, args);
	va_end(args);
	if (len > sizeof(buf) - 2)
		len = sizeof(buf) - 2;
	buf[len++] = '\n';
	while (done < len) {
		ssize_t n = write(tty, buf + done, len - done);

		if (n < 0 && errno != EINTR)
			die("writing to the port");
		if (n > 0)
			done += n;
	}
}

static void send_text(struct job *job, const char *verb)
{
	char text[sizeof(job->line) * 4 + 1];
	size_t i, n = 0;

	for (i = 0; i < job->used; i++) {
		unsigned char c = job->line[i];

		if (c < 0x20 || c >= 0x7f || c == '\\')
			n += sprintf(text + n, "\\x%02x", c);
		else
			text[n++] = c;
	}
	text[n] = '\0';
	send_line(job->id, "%s %s", verb, text);
	job->used = 0;
}

static struct job *find_job(const char *id)
{
	for (int i = 0; i < MAX_JOBS; i++)
		if (jobs[i].id[0] && !strcmp(jobs[i].id, id))
			return &jobs[i];
	return NULL;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Sends on what is there to read; the pipe does not block. */
static void pass_output(struct job *job)
{
	char buf[4096];
	ssize_t n;

	while (job->out >= 0) {
		n = read(job->out, buf, sizeof(buf));
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n <= 0) {
			close_fd(&job->out);
			return;
		}
		for (ssize_t i = 0; i < n; i++) {
			if (buf[i] == '\n') {
				send_text(job, "out");
				continue;
			}
			job->line[job->used++] = buf[i];
			if (job->used == sizeof(job->line))
				send_text(job, "part");
		}
	}
}

static void reap(void)
{
	int status;
	pid_t pid;
	char drain[64];

	while (read(child_died[0], drain, sizeof(drain)) > 0)
		;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		for (int i = 0; i < MAX_JOBS; i++) {
			struct job *job = &jobs[i];

			if (!job->id[0] || job->pid != pid)
				continue;
			pass_output(job);
			if (job->used)
				send_text(job, "part");
			send_line(job->id, "exit %d", WIFEXITED(status) ?
				  WEXITSTATUS(status) : 128 + WTERMSIG(status));
			close_fd(&job->in);
			close_fd(&job->out);
			job->id[0] = '\0';
		}
	}
}

static void start(const char *id, const char *command)
{
	struct job *job = NULL;
	int in[2], out[2];

	for (int i = 0; i < MAX_JOBS && !job; i++)
		if (!jobs[i].id[0])
			job = &jobs[i];
	if (!job || find_job(id)) {
		send_line(id, "error %s", job ? "that ID is in use" :
			  "too many commands at once");
		return;
	}
	if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC))
		die("pipe");
	job->pid = fork();
	if (job->pid < 0)
		die("fork");
	if (job->pid == 0) {
		setsid();
		signal(SIGPIPE, SIG_DFL);
		dup2(in[0], 0);
		dup2(out[1], 1);
		dup2(out[1], 2);
		execl("/bin/sh", "sh", "-c", command, (char *)NULL);
		_exit(127);
	}
	close(in[0]);
	close(out[1]);
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	fcntl(out[0], F_SETFL, O_NONBLOCK);
	job->in = in[1];
	job->out = out[0];
	job->used = 0;
	snprintf(job->id, sizeof(job->id), "%s", id);
	send_line(id, "pid %d", job->pid);
}

static void feed(struct job *job, const char *text)
{
	char buf[MAX_LINE];
	int len = snprintf(buf, sizeof(buf), "%s\n", text);

	if (job->in < 0 || write(job->in, buf, len) != len)
		send_line(job->id, "error the command takes no input");
}

static void handle(char *line)
{
	char *id = strsep(&line, " ");
	char *verb = strsep(&line, " ");
	const char *rest = line ? line : "";
	struct job *job;

	if (!verb || !*id || strlen(id) >= sizeof(jobs[0].id))
		return;
	if (!strcmp(verb, "ping")) {
		send_line(id, "pong %s", boot_id);
		return;
	}
	if (!strcmp(verb, "run")) {
		start(id, rest);
		return;
	}
	job = find_job(id);
	if (!job)
		return;		/* it ended while this was on its way */
	if (!strcmp(verb, "in"))
		feed(job, rest);
	else if (!strcmp(verb, "eof"))
		close_fd(&job->in);
	else if (!strcmp(verb, "kill"))
		kill(-job->pid, atoi(rest));
	else
		send_line(id, "error unknown verb");
}

static void on_sigchld(int sig)
{
	(void)sig;
	if (write(child_died[1], "", 1) < 0)
		return;		/* full: a wake-up is pending anyway */
}

static void take_input(void)
{
	static char line[MAX_LINE];
	static size_t used;
	char buf[512];
	ssize_t n = read(tty, buf, sizeof(buf));

	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return;
	if (n <= 0)
		die("reading from the port");
	for (ssize_t i = 0; i < n; i++) {
		if (buf[i] == '\n') {
			line[used] = '\0';
			handle(line);
			used = 0;
		} else if (used < sizeof(line) - 1) {
			line[used++] = buf[i];
		}
	}
}

static void open_port(const char *path)
{
	struct termios settings;

	tty = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (tty < 0 || tcgetattr(tty, &settings))
		die(path);
	cfmakeraw(&settings);
	settings.c_cflag |= CLOCAL | CREAD;
	/* QEMU times its receive interrupt by the line's speed. */
	cfsetspeed(&settings, B115200);
	if (tcsetattr(tty, TCSANOW, &settings))
		die(path);
}

static void read_boot_id(void)
{
	FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");

	if (!file || !fgets(boot_id, sizeof(boot_id), file))
		strcpy(boot_id, "unknown");
	if (file)
		fclose(file);
	boot_id[strcspn(boot_id, "\n")] = '\0';
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_sigchld,
				    .sa_flags = SA_RESTART | SA_NOCLDSTOP };

	if (argc != 2) {
		fprintf(stderr, "usage: agent PORT\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	if (pipe2(child_died, O_NONBLOCK | O_CLOEXEC))
		die("pipe");
	sigaction(SIGCHLD, &action, NULL);
	read_boot_id();
	open_port(argv[1]);
	send_line("-", "ready %s", boot_id);

	for (;;) {
		struct pollfd fds[MAX_JOBS + 2] = {
			{ .fd = tty, .events = POLLIN },
			{ .fd = child_died[0], .events = POLLIN },
		};

		for (int i = 0; i < MAX_JOBS; i++) {
			fds[i + 2].fd = jobs[i].id[0] ? jobs[i].out : -1;
			fds[i + 2].events = POLLIN;
		}
		if (poll(fds, MAX_JOBS + 2, -1) < 0) {
			if (errno != EINTR)
				die("poll");
			continue;
		}
		for (int i = 0; i < MAX_JOBS; i++)
			if (fds[i + 2].revents)
				pass_output(&jobs[i]);
		if (fds[1].revents)
			reap();
		if (fds[0].revents)
			take_input();
	}
}
