// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Reads every file below tracefs once, as a curious user or a crash collector
 * would, without waiting and without reading without end.
 *
 *	readtracefs [-b BYTES] [DIRECTORY]
 *
 * Of each file at most BYTES (64 KiB otherwise) and two seconds. Files that
 * nobody may read are left alone: closing free_buffer empties the trace.
 * Prints a line for each file that could not be read, then
 * "files N bytes N errors N". A file with nothing to give just now (EAGAIN) is
 * no error. Exit status 1 if nothing at all was read.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static unsigned long limit = 65536;
static unsigned long files, bytes, errors;

/* Only there to end a read that waits. */
static void on_alarm(int sig)
{
	(void)sig;
}

static int visit(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	static char buf[16384];
	unsigned long total = 0;
	ssize_t n = 0;
	int fd;

	(void)ftw;
	if (type != FTW_F || !(st->st_mode & 0444))
		return 0;
	files++;
	alarm(2);
	fd = open(path, O_RDONLY | O_NONBLOCK);
	if (fd >= 0) {
		while (total < limit && (n = read(fd, buf, sizeof(buf))) > 0)
			total += n;
	}
	if (fd < 0 || (n < 0 && errno != EAGAIN)) {
		errors++;
		printf("%s: %s\n", path, strerror(errno));
	}
	alarm(0);
	if (fd >= 0)
		close(fd);
	bytes += total;
	return 0;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_alarm };
	const char *root = "/sys/kernel/tracing";
	int option;

	while ((option = getopt(argc, argv, "b:")) != -1) {
		if (option != 'b') {
			fprintf(stderr, "usage: readtracefs [-b BYTES] [DIRECTORY]\n");
			return 2;
		}
		limit = strtoul(optarg, NULL, 10);
	}
	if (optind < argc)
		root = argv[optind];
	sigaction(SIGALRM, &action, NULL);	/* no SA_RESTART */
	if (nftw(root, visit, 16, FTW_PHYS)) {
		perror(root);
		return 1;
	}
	printf("files %lu bytes %lu errors %lu\n", files, bytes, errors);
	return bytes == 0;
}
