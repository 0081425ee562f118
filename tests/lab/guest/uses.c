// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Uses what the benign hooks of tests/lab/modules/ hook, each once a round, for
 * baselines and hooks to be seen by: lists /proc, reads a file of it, asks for
 * the kernel's name, reads the list of TCP sockets (which has one), makes a
 * system call as 32-bit programs do, and starts a program.
 *
 *	uses [ROUNDS]
 *
 * Without end where there is no number. Prints "used ROUNDS" at the end.
 */
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

/* The number of getpid() for 32-bit programs */
#define GETPID_32	20

static void failed(const char *what)
{
	perror(what);
	exit(1);
}

static void list_proc(void)
{
	DIR *dir = opendir("/proc");

	if (!dir)
		failed("uses: /proc");
	while (readdir(dir))
		;
	closedir(dir);
}

/* Reads once, or to the end, which takes one read more. */
static void read_file(const char *path, int to_its_end)
{
	char buf[4096];
	int fd = open(path, O_RDONLY);

	if (fd < 0 || read(fd, buf, sizeof(buf)) <= 0)
		failed(path);
	while (to_its_end && read(fd, buf, sizeof(buf)) > 0)
		;
	close(fd);
}

static void listen_somewhere(void)
{
	struct sockaddr_in any = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof(any)) || listen(fd, 1))
		failed("uses: a socket");
}

static void start_program(const char *itself)
{
	int status;
	pid_t child = vfork();

	if (child < 0)
		failed("uses: vfork");
	if (child == 0) {
		execl(itself, itself, "0", NULL);
		_exit(127);
	}
	if (waitpid(child, &status, 0) != child || status)
		failed("uses: its child");
}

int main(int argc, char **argv)
{
	long rounds = argc > 1 ? strtol(argv[1], NULL, 10) : -1;

	if (rounds == 0)
		return 0;
	listen_somewhere();
	for (long done = 0; done != rounds; done++) {
		struct utsname name;
		long pid;

		list_proc();
		/*
		 * Nowhere else is a file opened after a single read: where uname()
		 * leaves no trace, that shows.
		 */
		read_file("/proc/uptime", 0);
		if (uname(&name))
			failed("uses: uname");
		read_file("/proc/net/tcp", 1);
		asm volatile("int $0x80" : "=a"(pid) : "0"((long)GETPID_32) : "memory");
		if (pid != getpid())
			failed("uses: int 0x80");
		start_program("/bin/uses");
	}
	printf("used %ld\n", rounds);
	return 0;
}
