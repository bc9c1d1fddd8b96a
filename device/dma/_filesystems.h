/* Which files a card may have mapped.
 *
 * A page of a mapped file is brought in when it is touched, and whoever touches it waits for its file system, with the card's
 * gate closed. Memory, and disks of this machine, answer soon. A file system that a process or another machine answers for (FUSE,
 * NFS, CIFS, 9p, Ceph) need not answer at all, and might be the client's own: its files are refused.
 */
#ifndef TRIONIC_FILESYSTEMS_H
#define TRIONIC_FILESYSTEMS_H

#include <stddef.h>
#include <sys/vfs.h>
#include <unistd.h>

#define TRIONIC_HUGETLBFS 0x958458f6ul

/* linux/magic.h, and bcachefs's and ZFS's own headers */
static const unsigned long trionic_local_filesystems[] = {
    0x01021994ul,       /* tmpfs: memfds, /dev/shm, /dev */
    TRIONIC_HUGETLBFS,
    0x858458f6ul,       /* ramfs */
    0xef53ul,           /* ext2, ext3, ext4 */
    0x58465342ul,       /* XFS */
    0x9123683eul,       /* btrfs */
    0xf2f52010ul,       /* F2FS */
    0xca451a4eul,       /* bcachefs */
    0x2fc12fc1ul,       /* ZFS */
    0x794c7630ul,       /* overlayfs, which containers run on */
};

/* Whether the file of this descriptor is on one of those. */
static int trionic_is_local(int fd)
{
    struct statfs fs;
    if (fstatfs(fd, &fs) != 0)
        return 0;
    for (size_t i = 0; i < sizeof(trionic_local_filesystems) / sizeof(trionic_local_filesystems[0]); i++)
        if ((unsigned long)fs.f_type == trionic_local_filesystems[i])
            return 1;
    return 0;
}

/* The smallest piece of a mapping of this file that can be replaced by another: the huge page on hugetlbfs. */
static size_t trionic_page_of(int fd)
{
    struct statfs fs;
    if (fstatfs(fd, &fs) == 0 && (unsigned long)fs.f_type == TRIONIC_HUGETLBFS)
        return (size_t)fs.f_bsize;
    return (size_t)sysconf(_SC_PAGESIZE);
}

#endif
