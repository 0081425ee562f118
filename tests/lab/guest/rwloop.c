// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Makes a number of system calls that is known beforehand: COUNT times openat,
 * read, close, and nothing else between its first line and its last.
 *
 *	rwloop [-w] [-f FILE] COUNT
 *
 *	-w	wait for a line on standard input before the loop; that is one
 *		read more, begun before the line was written
 *	-f FILE	what to open; otherwise a small file that it makes in /tmp
 *
 * Prints "pid PID", then after the loop "opens N reads N closes N", each the
 * number of calls that succeeded. Exit status 0 if all did.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	const char *file = NULL;
	unsigned long count, opens = 0, reads = 0, closes = 0;
	int wait_for_line = 0, option;
	char buf[64] = "";

	while ((option = getopt(argc, argv, "wf:")) != -1) {
		if (option == 'w')
			wait_for_line = 1;
		else if (option == 'f')
			file = optarg;
		else
			goto usage;
	}
	if (optind != argc - 1)
		goto usage;
	count = strtoul(argv[optind], NULL, 10);
	if (!file) {
		int fd;

		file = "/tmp/rwloop.data";
		fd = open(file, O_WRONLY | O_CREAT | O_TRUNC, 0600);
		if (fd < 0 || write(fd, buf, sizeof(buf)) != sizeof(buf)) {
			perror(file);
			return 1;
		}
		close(fd);
	}

	printf("pid %d\n", getpid());
	fflush(stdout);
	if (wait_for_line && read(0, buf, sizeof(buf)) <= 0) {
		fprintf(stderr, "rwloop: no line came on standard input\n");
		return 1;
	}
	for (unsigned long i = 0; i < count; i++) {
		int fd = open(file, O_RDONLY);

		opens += fd >= 0;
		reads += read(fd, buf, sizeof(buf)) > 0;
		closes += close(fd) == 0;
	}
	printf("opens %lu reads %lu closes %lu\n", opens, reads, closes);
	return !(opens == count && reads == count && closes == count);
usage:
	fprintf(stderr, "usage: rwloop [-w] [-f FILE] COUNT\n");
	return 2;
}
