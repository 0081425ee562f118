// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Wakes up a thousand times a second and tells by how much it was late: what
 * stops the guest, or only its CPU, shows up as a gap.
 *
 *	timerloop [-p CPU] SECONDS
 *
 * SIGTERM ends it before its time. Prints, times by CLOCK_MONOTONIC in microseconds:
 *
 *	ticks N			how often it woke up
 *	bucket LOW HIGH N	gaps g between two wake-ups, LOW <= g < HIGH
 *	quantile PERMILLE LENGTH	so many of the first 65536 gaps are shorter
 *	gap LENGTH at TIME	the ten longest, longest first
 *	max LENGTH
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PERIOD_NS 1000000L
#define BUCKETS 24
#define LONGEST 10
#define KEPT 65536

struct gap {
	unsigned long us;
	unsigned long at;
};

static unsigned long buckets[BUCKETS];	/* by power of two */
static struct gap longest[LONGEST];
static unsigned long kept[KEPT];
static unsigned long nr_kept;
static volatile sig_atomic_t ended;

static void on_term(int sig)
{
	(void)sig;
	ended = 1;
}

static int compare(const void *a, const void *b)
{
	unsigned long x = *(const unsigned long *)a, y = *(const unsigned long *)b;

	return (x > y) - (x < y);
}

static unsigned long microseconds(const struct timespec *t)
{
	return t->tv_sec * 1000000UL + t->tv_nsec / 1000;
}

static void note(unsigned long us, unsigned long at)
{
	int bucket = 0;
	int place = LONGEST;

	while (bucket < BUCKETS - 1 && us >= 2UL << bucket)
		bucket++;
	buckets[bucket]++;
	if (nr_kept < KEPT)
		kept[nr_kept++] = us;
	while (place > 0 && us > longest[place - 1].us)
		place--;
	if (place == LONGEST)
		return;
	memmove(&longest[place + 1], &longest[place],
		(LONGEST - 1 - place) * sizeof(longest[0]));
	longest[place] = (struct gap){ us, at };
}

int main(int argc, char **argv)
{
	unsigned long ticks = 0, last, end;
	struct timespec due, now;
	int option;

	while ((option = getopt(argc, argv, "p:")) != -1) {
		cpu_set_t cpus;

		if (option != 'p')
			goto usage;
		CPU_ZERO(&cpus);
		CPU_SET(atoi(optarg), &cpus);
		if (sched_setaffinity(0, sizeof(cpus), &cpus)) {
			perror("timerloop: sched_setaffinity");
			return 1;
		}
	}
	if (optind != argc - 1)
		goto usage;

	signal(SIGTERM, on_term);
	clock_gettime(CLOCK_MONOTONIC, &due);
	last = microseconds(&due);
	end = last + strtoul(argv[optind], NULL, 10) * 1000000UL;
	while (last < end && !ended) {
		unsigned long at;

		due.tv_nsec += PERIOD_NS;
		if (due.tv_nsec >= 1000000000L) {
			due.tv_nsec -= 1000000000L;
			due.tv_sec++;
		}
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
		clock_gettime(CLOCK_MONOTONIC, &now);
		at = microseconds(&now);
		note(at - last, last);
		last = at;
		ticks++;
		/* What was missed is not made up for by a burst. */
		if (at > microseconds(&due) + PERIOD_NS / 1000)
			due = now;
	}

	printf("ticks %lu\n", ticks);
	for (int i = 0; i < BUCKETS; i++)
		if (buckets[i])
			printf("bucket %lu %lu %lu\n", i ? 1UL << i : 0,
			       2UL << i, buckets[i]);
	qsort(kept, nr_kept, sizeof(kept[0]), compare);
	for (int i = 0; i < 4; i++) {
		static const int permille[] = { 500, 900, 990, 999 };

		if (nr_kept)
			printf("quantile %d %lu\n", permille[i],
			       kept[nr_kept * permille[i] / 1000]);
	}
	for (int i = 0; i < LONGEST && longest[i].us; i++)
		printf("gap %lu at %lu\n", longest[i].us, longest[i].at);
	printf("max %lu\n", longest[0].us);
	return 0;
usage:
	fprintf(stderr, "usage: timerloop [-p CPU] SECONDS\n");
	return 2;
}
