// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Lists /proc and reads /proc/uptime so many times, for baselines and hooks to
 * be seen by.
 *
 *	listproc COUNT
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	long count = argc == 2 ? strtol(argv[1], NULL, 10) : 0;

	if (count <= 0) {
		fprintf(stderr, "usage: listproc COUNT\n");
		return 2;
	}
	for (long done = 0; done < count; done++) {
		char buf[256];
		DIR *dir = opendir("/proc");
		int fd;

		if (!dir) {
			perror("listproc: /proc");
			return 1;
		}
		while (readdir(dir))
			;
		closedir(dir);
		fd = open("/proc/uptime", O_RDONLY);
		if (fd < 0 || read(fd, buf, sizeof(buf)) <= 0) {
			perror("listproc: /proc/uptime");
			return 1;
		}
		close(fd);
	}
	printf("listed %ld\n", count);
	return 0;
}
