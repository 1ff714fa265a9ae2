; A game in 512 bytes: walk the @ to the * with the arrow keys or w, a, s, d. It counts the steps; r plays again, q ends.
    bits 16
    org 0x7c00

new_game:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ax, 0x0003
    int 0x10
    mov ah, 0x01
    mov cx, 0x2607
    int 0x10
    xor ah, ah              ; a goal that nobody knows before
    int 0x1a
    mov byte [steps], '0'
    mov word [spot], 0x0505   ; row, column
    mov word [goal], 0x0508
    mov dx, [goal]
    mov al, '*'
    call put
draw:
    mov dx, [spot]
    mov al, '@'
    call put
    cmp dx, [goal]
    je won
key:
    xor ah, ah
    int 0x16
    mov dx, [spot]
    cmp ah, 0x4b
    je left
    cmp al, 'a'
    je left
    cmp ah, 0x4d
    je right
    cmp al, 'd'
    je right
    cmp ah, 0x48
    je up
    cmp ah, 0x50
    je down
    cmp al, 'q'
    je quit
    jmp key
left:
    dec dl
    jmp moved
right:
    inc dl
    jmp moved
up:
    dec dh
    jmp moved
down:
    inc dh
moved:
    push dx
    mov dx, [spot]
    mov al, ' '
    call put
    pop dx
    mov [spot], dx
    inc byte [steps]
    jmp draw
won:
    mov ah, 0x13
    mov al, 1
    mov bx, 0x000a
    mov cx, text_end - text
    mov dx, 0x0700
    mov bp, text
    int 0x10
again:
    mov ah, 0x01            ; a game polls
    int 0x16
    jz again
    xor ah, ah
    int 0x16
    cmp al, 'r'
    je new_game
quit:
    int 0x19

put:
    pusha
    mov ah, 0x02
    xor bh, bh
    int 0x10
    popa
    pusha
    mov ah, 0x09
    mov bx, 0x000e
    mov cx, 1
    int 0x10
    popa
    ret

text:  db "You won in "
steps: db "0 steps", 13, 10
text_end:
spot:  dw 0
goal:  dw 0

    times 510-($-$$) db 0
    dw 0xaa55
